"""Tiny random models of every language model family; nothing is downloaded."""

FAMILIES = ("opt", "llama", "mistral", "qwen2", "qwen3")
VOCABULARY = 96


def tiny_config(family: str):
    """A configuration of two heads more queries than keys (GQA) where the family has it, of three blocks."""
    import transformers

    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    if family == "opt":
        return transformers.OPTConfig(**common, ffn_dim=48, word_embed_proj_dim=32, dropout=0.3)
    grouped = common | {"intermediate_size": 48, "num_key_value_heads": 2}
    if family == "llama":
        return transformers.LlamaConfig(**grouped)
    if family == "mistral":
        return transformers.MistralConfig(**grouped, sliding_window=6)
    if family == "qwen2":  # the last block attends in a window, the others do not
        return transformers.Qwen2Config(**grouped, use_sliding_window=True, sliding_window=6, max_window_layers=2)
    return transformers.Qwen3Config(**grouped, head_dim=16, tie_word_embeddings=True)


def make_tokenizer(family: str):
    """A tokenizer of whole words; of characters for Qwen2, for which transformers takes no other class than its own."""
    import tokenizers
    import transformers

    if family == "qwen2":
        return transformers.Qwen2Tokenizer({token: i for i, token in enumerate(["<|endoftext|>", "Ġ", "w", *"0123456789"])})
    words = {"<unk>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
