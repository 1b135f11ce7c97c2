"""Parts of the modules: table of model families, stream of blocks, encoders, compressed linears."""
