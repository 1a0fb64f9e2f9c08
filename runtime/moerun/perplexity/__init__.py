"""What quantisation and lossy policies cost in perplexity, over a grid of both."""
