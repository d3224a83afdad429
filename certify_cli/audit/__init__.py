"""What a finished or running run is held against: policies, other runs, its own records."""
