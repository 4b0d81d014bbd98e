"""Found by pytest before the tests, so that those in folders can import what stands beside this file."""
