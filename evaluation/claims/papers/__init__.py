"""One file per published claim: `x_y.py` holds `CLAIM = Claim("x-y", ...)`."""
