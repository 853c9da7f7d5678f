"""Other libraries' files and models: what is read from them and written for them."""
