"""What is best. Pure: enumerate, drop the forbidden, price, choose, explain."""
