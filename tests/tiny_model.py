"""A tiny real Llama with a real tokenizer, made in a moment: the student and teacher of tests."""

from pathlib import Path

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(texts=()):
    """A byte-level BPE tokenizer with ChatML markers, trained on a few lines: about 300 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(
        [*texts, "what is two plus two? it is four. user assistant system"], trainer
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(seed=0, *, layers=2, hidden=32, vocab=304, tied=True, std=0.2, head_dim=None):
    """A tiny float32 Llama with grouped-query attention; `std` large enough to have opinions."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=std,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


HYBRIDS = {
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "Qwen3_5Text": {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8}
    | {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    | {"linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "FalconH1": {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64},
    "Mamba": {"state_size": 8},
}


def save_hybrid(path: Path, family: str, seed=0, vocab=304) -> Path:
    """Save a tiny model with recurrent or convolutional layers, as `save_model` does a Llama."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **HYBRIDS[family],
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def save_model(path: Path, **kwargs) -> Path:
    """Save a tiny model and its tokenizer as a Hugging Face directory."""
    make_model(**kwargs).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path
