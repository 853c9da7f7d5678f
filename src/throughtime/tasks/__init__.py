"""What people come to do: read a table, train on it, compare cells."""
