"""The built-in certifiers, one module each; they come in through the same hooks as anybody's."""
