"""Generated tasks: associative recall on ids, needles in text, pairs of answers. Pure functions of a seed."""
