"""Cost as work grows: points measured in processes of their own, and a picture of each curve."""
