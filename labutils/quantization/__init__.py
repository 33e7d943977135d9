"""Numbers in few bits: integers with a scale, one bit, small floats, packed storage, integer arithmetic, theory."""
