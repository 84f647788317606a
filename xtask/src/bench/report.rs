//! Output of the benchmark program: its progress, rows of tables and figures.

use super::figures::Figure;

/// Number of ends of the host during one measurement after which that is given up.
const ENDS: usize = 2;

/// Parsed output of the program.
#[derive(Default)]
pub struct Report {
    /// Figures, the last one of each name.
    pub figures: Vec<Figure>,
    /// Measurements that are not to be repeated.
    pub done: Vec<String>,
    /// Rows of tables, each with the header of its table.
    rows: Vec<(String, String)>,
    /// The measurement in progress.
    begun: Option<String>,
    /// Measurements during which the host ended, once for each end.
    ends: Vec<String>,
    header: Option<String>,
}

impl Report {
    /// Parses a line.
    pub fn line(&mut self, line: &str) {
        if let Some(header) = self.header.take() {
            self.rows.push((header, line.to_owned()));
        } else if let Some(header) = line.strip_prefix("== row ") {
            self.header = Some(header.to_owned());
        } else if let Some(name) = line.strip_prefix("== begin ") {
            self.begun = Some(name.to_owned());
        } else if let Some(name) = line.strip_prefix("== done ") {
            self.begun = None;
            self.done.push(name.to_owned());
        } else if let Some(figure) = line.strip_prefix("== figure ").and_then(Figure::parse) {
            // A measurement that is repeated replaces its figures.
            self.figures.retain(|known| !known.is_same(&figure));
            self.figures.push(figure);
        }
    }

    /// True without rows of tables.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Records that the host has ended. False if the measurement in progress is given up.
    pub fn interrupted(&mut self) -> bool {
        self.header = None;
        let Some(name) = self.begun.take() else {
            return true;
        };
        self.ends.push(name.clone());
        let ends = self.ends.iter().filter(|ended| **ended == name).count();
        if ends < ENDS {
            return true;
        }
        println!("not measured: {name}, under which the emulated host ended {ENDS} times");
        self.done.push(name);
        false
    }

    /// The tables in Markdown, in the order of their first lines.
    pub fn tables(&self) -> String {
        let mut text = String::new();
        let mut headers: Vec<&str> = Vec::new();
        for (header, _) in &self.rows {
            if !headers.contains(&header.as_str()) {
                headers.push(header);
            }
        }
        for header in headers {
            let columns = header.matches('|').count().saturating_sub(1);
            text += &format!("\n{header}\n|{}\n", "---|".repeat(columns));
            for (_, row) in self.rows.iter().filter(|(of, _)| of == header) {
                text += &format!("{row}\n");
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report_of(lines: &str) -> Report {
        let mut report = Report::default();
        lines.lines().for_each(|line| report.line(line));
        report
    }

    #[test]
    fn rows_are_gathered_by_their_tables() {
        let report = report_of(
            "== begin one\nbooting\n== row | a | b |\n| 1 | 2 |\n== row | c |\n| 3 |\n\
             == row | a | b |\n| 4 | 5 |\n== done one",
        );
        let tables = "\n| a | b |\n|---|---|\n| 1 | 2 |\n| 4 | 5 |\n\n| c |\n|---|\n| 3 |\n";
        assert_eq!(report.tables(), tables);
        assert_eq!(report.done, ["one"]);
    }

    #[test]
    fn a_measurement_that_ends_the_host_twice_is_given_up() {
        let mut report = report_of("== begin one\n== done one\n== begin two\n== row | a |");
        assert!(report.interrupted());
        assert_eq!(report.done, ["one"]);
        report.line("== begin two");
        assert!(report.rows.is_empty(), "half a row is none");
        assert!(!report.interrupted());
        assert_eq!(report.done, ["one", "two"]);
    }
}
