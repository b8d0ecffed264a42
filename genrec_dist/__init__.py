"""genrec_dist: generative recommenders from raw reviews to a trained model and an honest study."""

import os

# Ray reads this when it is imported: with token authentication nobody runs code on our workers uninvited.
os.environ.setdefault("RAY_AUTH_MODE", "token")

__version__ = "0.1.0"
