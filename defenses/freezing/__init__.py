"""../defenses/freezing"""
