"""One program for each common way to train with centers, on scikit-learn's digits, as files that run on their own."""
