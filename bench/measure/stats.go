package measure

import (
	"cmp"
	"maps"
	"slices"
)

// Number is what statistics are made of.
type Number interface {
	~int | ~int64 | ~float64
}

// Quantile is the value below which a share q of all values is, from 0 to 1, by the nearest
// rank; 0 for no values.
func Quantile[V Number](values []V, q float64) V {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(values))
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}

// Median is the upper median.
func Median[V Number](values []V) V { return Quantile(values, 0.5) }

// Slope is the growth of y for each unit of x, by least squares; 0 if all x are the same.
func Slope(x, y []float64) float64 {
	var meanX, meanY, sxy, sxx float64
	n := float64(len(x))
	for i := range x {
		meanX += x[i] / n
		meanY += y[i] / n
	}
	for i := range x {
		sxy += (x[i] - meanX) * (y[i] - meanY)
		sxx += (x[i] - meanX) * (x[i] - meanX)
	}
	if sxx == 0 {
		return 0
	}
	return sxy / sxx
}

func sortedKeys[K cmp.Ordered, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }
