//go:build !race

package tokencache

// seeds is how many the model test tries.
const seeds = 300
