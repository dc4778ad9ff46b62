"""From data files to token ids: records, prompts, tokenizer and chat template."""
