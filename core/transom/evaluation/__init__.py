"""How good a loaded model is: against another program, by attention head, and by the share of keys it reads."""
