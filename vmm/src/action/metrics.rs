//! Metrics as plain data, and their form as a line of JSON.

use serde_json::{Map, Value};

/// Prometheus type of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricKind {
    /// It only rises; its name ends in `_total`.
    Counter,
    /// It rises and falls.
    Gauge,
}

/// One value of a metric.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Label names and values. Every sample of a family has the same names in the same order.
    pub labels: Vec<(&'static str, String)>,
    /// The value, in the unit that the family's name ends with.
    pub value: u64,
}

/// A metric and all its samples.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetricFamily {
    /// Name in Prometheus' form: `portcullis_iotlb_misses_total`.
    pub name: &'static str,
    /// One sentence for the `# HELP` line.
    pub help: &'static str,
    /// Counter or gauge.
    pub kind: MetricKind,
    /// One sample for each combination of label values.
    pub samples: Vec<Sample>,
}

impl MetricFamily {
    /// Creates a metric with these samples: a counter if its name ends in `_total`, else a gauge.
    #[must_use]
    pub fn new(name: &'static str, help: &'static str, samples: Vec<Sample>) -> Self {
        Self {
            name,
            help,
            kind: match name.ends_with("_total") {
                true => MetricKind::Counter,
                false => MetricKind::Gauge,
            },
            samples,
        }
    }

    /// Creates a metric with one sample and no labels.
    #[must_use]
    pub fn single(name: &'static str, help: &'static str, value: u64) -> Self {
        let labels = Vec::new();
        Self::new(name, help, vec![Sample { labels, value }])
    }

    /// Creates a metric with a sample for each value of `label`.
    #[must_use]
    pub fn by(
        label: &'static str,
        name: &'static str,
        help: &'static str,
        values: impl Iterator<Item = (String, u64)>,
    ) -> Self {
        let samples = values.map(|(of, value)| Sample {
            labels: vec![(label, of)],
            value,
        });
        Self::new(name, help, samples.collect())
    }
}

/// The line that goes into the file of `PUT /metrics`, without a newline: a JSON object with the
/// time in milliseconds since 1970, and each family by its name. Samples with labels are objects
/// in objects, by label value: `{"net0": {"translation": 2}}`.
#[must_use]
pub(crate) fn metrics_json(families: &[MetricFamily], utc_timestamp_ms: u64) -> String {
    let mut line = Map::new();
    line.insert("utc_timestamp_ms".to_owned(), utc_timestamp_ms.into());
    for family in families {
        for sample in &family.samples {
            let path = std::iter::once(family.name)
                .chain(sample.labels.iter().map(|(_, value)| value.as_str()));
            insert(&mut line, path, sample.value);
        }
    }
    Value::Object(line).to_string()
}

/// Sets the value at `path`, making the objects on the way.
fn insert<'a>(
    object: &mut Map<String, Value>,
    mut path: impl Iterator<Item = &'a str>,
    value: u64,
) {
    let Some(mut key) = path.next() else { return };
    let mut object = object;
    for next in path {
        let entry = object
            .entry(key)
            .or_insert_with(|| Value::Object(Map::new()));
        // A family that mixes labelled and unlabelled samples keeps the first one.
        let Value::Object(inner) = entry else { return };
        object = inner;
        key = next;
    }
    object.insert(key.to_owned(), value.into());
}
