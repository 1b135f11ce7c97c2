"""What the modules are made of: model tables, the stream of blocks, encoders, compressed linears."""
