"""What a method is: the interface that algorithms are written against."""
