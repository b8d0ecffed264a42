"""genrec_dist: generative recommenders from raw reviews to a trained model and an honest study."""

__version__ = "0.1.0"
