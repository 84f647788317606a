//! Figures of a run: a table of them, a file, and their comparison with an earlier run.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// A measured figure.
#[derive(Debug, PartialEq)]
pub struct Figure {
    /// Name of the measurement.
    measurement: String,
    /// Name of the figure, with its unit.
    what: String,
    /// The measured monitor.
    monitor: String,
    value: f64,
}

impl Figure {
    /// Parses `MEASUREMENT | WHAT | MONITOR | VALUE`.
    pub fn parse(line: &str) -> Option<Self> {
        let mut parts = line.split(" | ").map(str::to_owned);
        Some(Self {
            measurement: parts.next()?,
            what: parts.next()?,
            monitor: parts.next()?,
            value: parts.next()?.parse().ok()?,
        })
    }

    /// Whether both are the same figure, with any value.
    pub fn is_same(&self, other: &Self) -> bool {
        self.monitor == other.monitor && self.is_peer_of(other)
    }

    /// Whether both are the same figure of any monitor.
    fn is_peer_of(&self, other: &Self) -> bool {
        self.measurement == other.measurement && self.what == other.what
    }
}

/// The figures of one run.
pub struct Run {
    /// Architecture of the guests.
    pub arch: String,
    /// The measured commit.
    pub commit: String,
    /// Place of the guests, and its clock.
    pub place: String,
    /// In the order of measurement.
    pub figures: Vec<Figure>,
}

impl Run {
    /// Reads a file that [`Run::write`] wrote.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let run: Value = serde_json::from_slice(&text)
            .with_context(|| format!("{} is no JSON file", path.display()))?;
        let string = |value: &Value| value.as_str().map(str::to_owned);
        let parse = || {
            let figures = run["figures"].as_array()?.iter().map(|figure| {
                Some(Figure {
                    measurement: string(&figure["measurement"])?,
                    what: string(&figure["what"])?,
                    monitor: string(&figure["monitor"])?,
                    value: figure["value"].as_f64()?,
                })
            });
            Some(Self {
                arch: string(&run["arch"])?,
                commit: string(&run["commit"])?,
                place: string(&run["place"])?,
                figures: figures.collect::<Option<_>>()?,
            })
        };
        parse().with_context(|| format!("{} has not the figures of a run", path.display()))
    }

    /// Writes the run as JSON.
    pub fn write(&self, path: &Path) -> Result<()> {
        let figures = self.figures.iter().map(|figure| {
            json!({
                "measurement": figure.measurement,
                "what": figure.what,
                "monitor": figure.monitor,
                "value": figure.value,
            })
        });
        let run = json!({
            "arch": self.arch,
            "commit": self.commit,
            "place": self.place,
            "figures": figures.collect::<Vec<_>>(),
        });
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(path, format!("{run:#}\n"))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// A table in Markdown with a column for each monitor, and the ratio of the first to the
    /// second.
    pub fn table(&self) -> String {
        let mut monitors: Vec<&str> = Vec::new();
        for figure in &self.figures {
            if !monitors.contains(&figure.monitor.as_str()) {
                monitors.push(&figure.monitor);
            }
        }
        let [first, others @ ..] = monitors.as_slice() else {
            return String::new();
        };
        let mut columns = vec!["measurement", "figure"];
        columns.extend(&monitors);
        let ratio = others.first().map(|second| format!("{first} / {second}"));
        columns.extend(ratio.as_deref());
        let mut text = header(&columns);
        for (at, figure) in self.figures.iter().enumerate() {
            if self.figures[..at]
                .iter()
                .any(|known| known.is_peer_of(figure))
            {
                continue;
            }
            let of = |monitor: &&str| {
                let mut all = self.figures.iter();
                all.find(|other| other.monitor == *monitor && other.is_peer_of(figure))
                    .map(|other| other.value)
            };
            let values: Vec<_> = monitors.iter().map(of).collect();
            let mut cells = vec![figure.measurement.clone(), figure.what.clone()];
            cells.extend(
                values
                    .iter()
                    .map(|value| value.map_or("-".to_owned(), number)),
            );
            if let [one, two, ..] = values.as_slice() {
                cells.push(quotient(*one, *two));
            }
            text += &format!("| {} |\n", cells.join(" | "));
        }
        text
    }

    /// A table in Markdown of the figures that both runs have.
    pub fn comparison(&self, old: &Self) -> String {
        let (then, now) = (
            format!("{} (old)", old.commit),
            format!("{} (new)", self.commit),
        );
        let mut text = header(&["measurement", "figure", "monitor", &then, &now, "new / old"]);
        for figure in &self.figures {
            let Some(before) = old.figures.iter().find(|other| other.is_same(figure)) else {
                continue;
            };
            text += &format!(
                "| {} | {} | {} | {} | {} | {} |\n",
                figure.measurement,
                figure.what,
                figure.monitor,
                number(before.value),
                number(figure.value),
                quotient(Some(figure.value), Some(before.value)),
            );
        }
        text
    }
}

fn header(columns: &[&str]) -> String {
    format!(
        "\n| {} |\n|{}\n",
        columns.join(" | "),
        "---|".repeat(columns.len())
    )
}

fn quotient(of: Option<f64>, by: Option<f64>) -> String {
    match (of, by) {
        (Some(of), Some(by)) if by != 0.0 => format!("{:.2}", of / by),
        _ => "-".to_owned(),
    }
}

fn number(value: f64) -> String {
    if value.fract() == 0.0 || value.abs() >= 1000.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.1}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run_of(lines: &[&str]) -> Run {
        Run {
            arch: "x86_64".to_owned(),
            commit: "1234567".to_owned(),
            place: "in the lab".to_owned(),
            figures: lines
                .iter()
                .filter_map(|line| Figure::parse(line))
                .collect(),
        }
    }

    #[test]
    fn the_monitors_of_a_figure_share_a_row_with_their_ratio() {
        let run = run_of(&[
            "a | ms | portcullis | 3",
            "b | s | portcullis | 1.5",
            "a | ms | QEMU | 4",
        ]);
        let rows = "| a | ms | 3 | 4 | 0.75 |\n| b | s | 1.5 | - | - |\n";
        assert!(run.table().ends_with(rows), "{}", run.table());
        let alone = run_of(&["a | ms | portcullis | 3"]);
        assert!(
            alone.table().ends_with("| a | ms | 3 |\n"),
            "{}",
            alone.table()
        );
        assert_eq!(run_of(&["a | ms | portcullis | much"]).table(), "");
    }

    #[test]
    fn a_run_is_compared_with_its_file() {
        let path = std::env::temp_dir().join(format!("portcullis-run-{}.json", std::process::id()));
        run_of(&["a | ms | portcullis | 3", "c | ms | QEMU | 1"])
            .write(&path)
            .unwrap();
        let old = Run::read(&path).unwrap();
        fs::write(&path, "{}").unwrap();
        let incomplete = Run::read(&path).err().unwrap().to_string();
        fs::remove_file(&path).unwrap();
        assert!(incomplete.contains("figures of a run"), "{incomplete}");
        let text = run_of(&["a | ms | portcullis | 6", "a | ms | QEMU | 4"]).comparison(&old);
        assert!(
            text.ends_with("|\n| a | ms | portcullis | 3 | 6 | 2.00 |\n"),
            "{text}"
        );
    }
}
