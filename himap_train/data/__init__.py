"""From LLaVA JSON, JSONL and Hugging Face data sets to padded batches."""
