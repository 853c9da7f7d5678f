"""How far the signal reaches: the numbers, and apart from them their drawing."""
