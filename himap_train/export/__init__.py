"""From a training checkpoint of any strategy to what others load, without loading the model."""
