"""Tests of what people run: images built from this checkout, brought up by Compose on a real Docker Engine."""
