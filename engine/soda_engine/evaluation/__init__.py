"""What a trained model is measured by: features, probes on them, reconstruction scores, and the pictures of both.

Import from the modules: `probes` needs scikit-learn, `reconstruction` torchmetrics, `pictures` matplotlib.
"""
