"""What a person's browser meets: the page of `armm demo`, and the work behind it."""
