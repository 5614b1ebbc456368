"""One DVC stage a module: python -m tasks.NAME [ratio]."""
