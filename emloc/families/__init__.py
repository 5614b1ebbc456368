"""The only code that knows a family of models: how its data becomes model inputs."""
