package hbone

// Holding is how many wires that wait hold a whole buffer.
func Holding() int64 { return holding.Load() }
