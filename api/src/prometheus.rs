//! Metrics in Prometheus' text format, version 0.0.4.

use std::fmt::Write as _;
use vmm::action::{MetricFamily, MetricKind};

/// The media type of [`render`]'s text.
pub(crate) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Formats all families.
pub(crate) fn render(families: &[MetricFamily]) -> String {
    let mut text = String::new();
    for family in families {
        let kind = match family.kind {
            MetricKind::Counter => "counter",
            MetricKind::Gauge => "gauge",
        };
        let name = family.name;
        // Writing to a String does not fail.
        let _ = writeln!(text, "# HELP {name} {}", escape(family.help, false));
        let _ = writeln!(text, "# TYPE {name} {kind}");
        for sample in &family.samples {
            text.push_str(name);
            for (index, (label, value)) in sample.labels.iter().enumerate() {
                let before = if index == 0 { '{' } else { ',' };
                let _ = write!(text, "{before}{label}=\"{}\"", escape(value, true));
            }
            let after = if sample.labels.is_empty() { "" } else { "}" };
            let _ = writeln!(text, "{after} {}", sample.value);
        }
    }
    text
}

fn escape(text: &str, quotes: bool) -> String {
    let escaped = text.replace('\\', "\\\\").replace('\n', "\\n");
    if quotes {
        escaped.replace('"', "\\\"")
    } else {
        escaped
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm::action::Sample;

    #[test]
    fn families_are_described_once_and_labels_are_escaped() {
        let faults = MetricFamily {
            name: "faults_total",
            help: "Faults, by device.",
            kind: MetricKind::Counter,
            samples: vec![
                Sample {
                    labels: vec![("device", "a\"\\\n".to_owned()), ("type", "x".to_owned())],
                    value: 1,
                },
                Sample {
                    labels: vec![("device", "b".to_owned()), ("type", "x".to_owned())],
                    value: u64::MAX,
                },
            ],
        };
        let up = MetricFamily::single("up", "Up.", 1);
        assert_eq!(
            render(&[faults, up]),
            "# HELP faults_total Faults, by device.\n# TYPE faults_total counter\n\
             faults_total{device=\"a\\\"\\\\\\n\",type=\"x\"} 1\n\
             faults_total{device=\"b\",type=\"x\"} 18446744073709551615\n\
             # HELP up Up.\n# TYPE up gauge\nup 1\n"
        );
    }
}
