package telemetry

import (
	"context"
	"fmt"
	"time"

	"go.opentelemetry.io/otel/attribute"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	metricspb "go.opentelemetry.io/proto/otlp/metrics/v1"
	resourcepb "go.opentelemetry.io/proto/otlp/resource/v1"
)

// metricExporter exports what the producer makes.
type metricExporter struct{ *collector }

// Temporality implements sdkmetric.Exporter: what is exported has a temporality already.
func (metricExporter) Temporality(sdkmetric.InstrumentKind) metricdata.Temporality {
	return metricdata.CumulativeTemporality
}

// Aggregation implements sdkmetric.Exporter.
func (metricExporter) Aggregation(kind sdkmetric.InstrumentKind) sdkmetric.Aggregation {
	return sdkmetric.DefaultAggregationSelector(kind)
}

// Export implements sdkmetric.Exporter.
func (e metricExporter) Export(ctx context.Context, metrics *metricdata.ResourceMetrics) error {
	of := &metricspb.ResourceMetrics{Resource: &resourcepb.Resource{Attributes: attributesOf(*metrics.Resource.Set())}}
	for _, scope := range metrics.ScopeMetrics {
		in := &metricspb.ScopeMetrics{Scope: &commonpb.InstrumentationScope{Name: scope.Scope.Name}}
		for _, m := range scope.Metrics {
			metric, err := metricOf(m)
			if err != nil {
				return err
			}
			in.Metrics = append(in.Metrics, metric)
		}
		of.ScopeMetrics = append(of.ScopeMetrics, in)
	}
	// MetricsData has the encoding of ExportMetricsServiceRequest, whose package has gRPC in it.
	return e.send(ctx, &metricspb.MetricsData{ResourceMetrics: []*metricspb.ResourceMetrics{of}})
}

// ForceFlush implements sdkmetric.Exporter.
func (metricExporter) ForceFlush(context.Context) error { return nil }

// Shutdown implements sdkmetric.Exporter.
func (e metricExporter) Shutdown(context.Context) error {
	e.close()
	return nil
}

func metricOf(m metricdata.Metrics) (*metricspb.Metric, error) {
	out := &metricspb.Metric{Name: m.Name, Description: m.Description, Unit: m.Unit}
	switch data := m.Data.(type) {
	case metricdata.Gauge[float64]:
		out.Data = &metricspb.Metric_Gauge{Gauge: &metricspb.Gauge{DataPoints: numbersOf(data.DataPoints)}}
	case metricdata.Sum[float64]:
		out.Data = &metricspb.Metric_Sum{Sum: &metricspb.Sum{
			DataPoints: numbersOf(data.DataPoints), IsMonotonic: data.IsMonotonic, AggregationTemporality: metricspb.AggregationTemporality_AGGREGATION_TEMPORALITY_CUMULATIVE,
		}}
	case metricdata.Histogram[float64]:
		h := &metricspb.Histogram{AggregationTemporality: metricspb.AggregationTemporality_AGGREGATION_TEMPORALITY_CUMULATIVE}
		for _, p := range data.DataPoints {
			h.DataPoints = append(h.DataPoints, &metricspb.HistogramDataPoint{
				Attributes: attributesOf(p.Attributes), StartTimeUnixNano: nanoseconds(p.StartTime), TimeUnixNano: nanoseconds(p.Time),
				Count: p.Count, Sum: &p.Sum, ExplicitBounds: p.Bounds, BucketCounts: p.BucketCounts,
			})
		}
		out.Data = &metricspb.Metric_Histogram{Histogram: h}
	default:
		return nil, fmt.Errorf("metric %s: OTLP for %T is not written", m.Name, data)
	}
	return out, nil
}

func numbersOf(points []metricdata.DataPoint[float64]) (all []*metricspb.NumberDataPoint) {
	for _, p := range points {
		all = append(all, &metricspb.NumberDataPoint{
			Attributes: attributesOf(p.Attributes), StartTimeUnixNano: nanoseconds(p.StartTime), TimeUnixNano: nanoseconds(p.Time),
			Value: &metricspb.NumberDataPoint_AsDouble{AsDouble: p.Value},
		})
	}
	return all
}

func nanoseconds(t time.Time) uint64 { return uint64(t.UnixNano()) } //nolint:gosec // after 1970

func attributesOf(set attribute.Set) (all []*commonpb.KeyValue) {
	for _, a := range set.ToSlice() {
		value := &commonpb.AnyValue{}
		switch a.Value.Type() {
		case attribute.BOOL:
			value.Value = &commonpb.AnyValue_BoolValue{BoolValue: a.Value.AsBool()}
		case attribute.INT64:
			value.Value = &commonpb.AnyValue_IntValue{IntValue: a.Value.AsInt64()}
		default:
			value.Value = &commonpb.AnyValue_StringValue{StringValue: a.Value.String()}
		}
		all = append(all, &commonpb.KeyValue{Key: string(a.Key), Value: value})
	}
	return all
}
