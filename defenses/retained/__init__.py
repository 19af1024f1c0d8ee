"""What a bound (`retain`) did in a run: the ratio step by step, and what it trades for protection."""
