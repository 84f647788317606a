//! Lines of code, without blank lines, comments and tests: per crate, and the files that are too
//! long.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;

use super::modules;
use super::sources::{CRATES, Source};
use super::tally::{Tally, title};
use crate::paths;

/// Upper bound on the lines of code in a file.
const MOST: usize = 450;
/// Lower bound, exclusive, for files that the table names.
const LONG: usize = 400;
/// Files that may exceed the upper bound, each with the reason.
const LONGER: [(&str, &str); 0] = [];

/// A tree to count.
#[derive(clap::Args)]
pub struct LinesArgs {
    /// Top directory of the sources; this workspace when absent
    dir: Option<PathBuf>,
}

/// Checks the length of every file.
pub fn check(tally: &mut Tally) {
    const WHAT: &str = "length of files";
    title(WHAT);
    let counted = count(&paths::workspace()).map(|crates| {
        let files = crates.iter().flat_map(|counted| &counted.files);
        compare(files, &LONGER)
    });
    tally.count(WHAT, counted);
}

/// Prints the table.
pub fn run(args: &LinesArgs) -> Result<ExitCode> {
    let top = args.dir.clone().unwrap_or_else(paths::workspace);
    let (mut all, mut blocks) = (0, 0);
    let mut long = Vec::new();
    println!("{:14}{:>8}{:>8}", "crate", "lines", "unsafe");
    for counted in count(&top)? {
        println!(
            "{:14}{:>8}{:>8}",
            counted.name,
            counted.lines(),
            counted.blocks
        );
        if counted.product {
            all += counted.lines();
            blocks += counted.blocks;
        }
        long.extend(counted.files.into_iter().filter(|(_, lines)| *lines > LONG));
    }
    println!("{:14}{all:>8}{blocks:>8}", "product");
    println!("\n{} files over {LONG} lines", long.len());
    for (path, lines) in long {
        println!("{lines:>6}  {path}");
    }
    let cycles = modules::cycles(&top)?;
    println!("\n{} cycles of modules", cycles.len());
    for cycle in cycles {
        println!("  {}: {}", cycle.name, cycle.modules);
    }
    Ok(ExitCode::SUCCESS)
}

/// Counts of a crate.
struct Counted {
    name: &'static str,
    product: bool,
    /// Paths below the top directory, with their lines of code.
    files: Vec<(String, usize)>,
    /// Number of `unsafe` blocks.
    blocks: usize,
}

impl Counted {
    fn lines(&self) -> usize {
        self.files.iter().map(|(_, lines)| lines).sum()
    }
}

fn count(top: &Path) -> Result<Vec<Counted>> {
    let counted = CRATES.iter().map(|member| {
        let sources = member.read(top)?;
        let blocks = |source: &Source| source.text.matches("unsafe {").count();
        Ok(Counted {
            name: member.name,
            product: member.product,
            blocks: sources.iter().map(blocks).sum(),
            files: sources
                .into_iter()
                .map(|source| (source.path.clone(), source.lines()))
                .collect(),
        })
    });
    counted.collect()
}

/// Prints the files that are too long, and the exceptions that are not needed.
fn compare<'a>(files: impl Iterator<Item = &'a (String, usize)>, longer: &[(&str, &str)]) -> bool {
    let mut agree = true;
    let mut needless: Vec<&str> = longer.iter().map(|(path, _)| *path).collect();
    for (path, lines) in files.filter(|(_, lines)| *lines > MOST) {
        let listed = needless.len();
        needless.retain(|listed| listed != path);
        if needless.len() == listed {
            println!("{path} has {lines} lines of code, more than {MOST}");
            agree = false;
        }
    }
    for path in needless {
        println!("{path} is no longer too long, take it from the exceptions");
        agree = false;
    }
    agree
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_file_needs_an_exception_and_a_short_one_has_none() {
        let files = [("a.rs".to_owned(), MOST), ("b.rs".to_owned(), MOST + 1)];
        let check = |longer: &[(&str, &str)]| compare(files.iter(), longer);
        assert!(check(&[("b.rs", "a table")]));
        assert!(!check(&[]));
        assert!(!check(&[("b.rs", "a table"), ("a.rs", "a table")]));
        assert!(!check(&[("b.rs", "a table"), ("gone.rs", "a table")]));
    }
}
