"""A checkpoint behind an endpoint that speaks OpenAI's chat protocol: `recipes/serve.py`, docs/serving.md."""
