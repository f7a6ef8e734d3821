"""``make fuzz``: made and mutated inputs of every kind that people, servers and runs supply."""
