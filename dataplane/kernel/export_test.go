package kernel

// WithLayout stands in for an agent of another version, whose maps have another layout.
func (c Config) WithLayout(name string) Config {
	c.otherLayout = name
	return c
}
