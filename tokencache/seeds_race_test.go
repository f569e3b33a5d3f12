//go:build race

package tokencache

// seeds are fewer with the race detector, which takes ten times as long. What it looks
// for does not hang on a seed, and the answers are compared without it.
const seeds = 100
