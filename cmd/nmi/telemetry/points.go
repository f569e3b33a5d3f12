package telemetry

import (
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
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

func oneIf(yes bool, labels ...attribute.KeyValue) point {
	if yes {
		return of(1, labels...)
	}
	return of(0, labels...)
}

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
