"""SAM2S (arXiv 2511.16618) assembled from the modules of the sam2 package."""
