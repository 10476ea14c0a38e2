"""What a training run will take, before a machine is rented: parameters, FLOPs and memory without loading weights."""
