package telemetry

import (
	"slices"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/podidentity/nmi/proxy/histogram"
)

// list is the metrics of one scrape.
type list struct {
	metrics    []metricdata.Metrics
	since, now time.Time
}

// point is a number with its labels.
type point struct {
	value  float64
	labels []attribute.KeyValue
}

// number is a type that the parts count in.
type number interface{ ~int | ~uint64 | ~float64 }

func of[N number](value N, labels ...attribute.KeyValue) point {
	return point{float64(value), labels} // a counter that is exact no more has counted for thousands of years
}

func oneIf(yes bool) point {
	if yes {
		return of(1)
	}
	return of(0)
}

// durations is a histogram with its labels.
type durations struct {
	histogram.Snapshot
	labels []attribute.KeyValue
}

func spread(d histogram.Snapshot, labels ...attribute.KeyValue) durations {
	return durations{d, labels}
}

// fastBuckets is how many of the first buckets say nothing of what takes 10 ms and more.
const fastBuckets = 6

// counter adds what only grows.
func (l *list) counter(name, description string, points ...point) {
	l.add(name, "", description, metricdata.Sum[float64]{
		Temporality: metricdata.CumulativeTemporality, IsMonotonic: true, DataPoints: l.dataPoints(points),
	})
}

// gauge adds what grows and shrinks.
func (l *list) gauge(name, unit, description string, points ...point) {
	l.add(name, unit, description, metricdata.Gauge[float64]{DataPoints: l.dataPoints(points)})
}

// histogram adds durations. The first skip buckets are one with the next.
func (l *list) histogram(name, description string, skip int, all ...durations) {
	var bounds []float64
	for _, bound := range histogram.Bounds()[skip:] {
		bounds = append(bounds, bound.Seconds())
	}
	data := metricdata.Histogram[float64]{Temporality: metricdata.CumulativeTemporality}
	for _, d := range all {
		counts := slices.Clone(d.Buckets[skip:])
		for _, n := range d.Buckets[:skip] {
			counts[0] += n
		}
		data.DataPoints = append(data.DataPoints, metricdata.HistogramDataPoint[float64]{
			Attributes: attribute.NewSet(d.labels...), StartTime: l.since, Time: l.now,
			Count: d.Count(), Sum: d.Sum.Seconds(), Bounds: bounds, BucketCounts: counts,
		})
	}
	l.add(name, "s", description, data)
}

func (l *list) add(name, unit, description string, data metricdata.Aggregation) {
	l.metrics = append(l.metrics, metricdata.Metrics{Name: name, Unit: unit, Description: description, Data: data})
}

func (l *list) dataPoints(points []point) []metricdata.DataPoint[float64] {
	all := make([]metricdata.DataPoint[float64], 0, len(points))
	for _, p := range points {
		all = append(all, metricdata.DataPoint[float64]{Attributes: attribute.NewSet(p.labels...), StartTime: l.since, Time: l.now, Value: p.value})
	}
	return all
}
