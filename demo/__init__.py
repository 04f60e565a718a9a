"""What loraplex is for, told on real digits by a service that this package starts, kills and starts again."""
