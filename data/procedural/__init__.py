"""Generated tasks: associative recall on ids, needles in text. Pure functions of their settings and a seed."""
