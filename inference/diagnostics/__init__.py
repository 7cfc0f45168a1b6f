"""What a posterior can and cannot be trusted with."""
