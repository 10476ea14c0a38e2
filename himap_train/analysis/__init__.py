"""Pictures of what the pruner keeps."""
