//! `portcullis ctl`: sends requests to a running machine.
//!
//! Exit status: 0 done; 1 the machine refused; 2 the request is not valid; 3 no machine answers.

mod map;
mod show;

use crate::streams;
use api::client::{self, Answer, ClientError};
use clap::{Args, Subcommand};
use serde_json::Value;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use vmm::action::{EndpointInfo, InstanceInfo, IommuInfo, Mapping, MappingsPage};
use vmm::config::{VmConfig, closest};
use vmm::error::Chain;

/// Path of the API socket when no option gives it.
const SOCKET_VARIABLE: &str = "PORTCULLIS_API_SOCKET";

/// Timeout of a query.
const QUERY_TIMEOUT: Duration = Duration::from_secs(10);

/// Timeout of a change: longer than the monitor itself waits for its machine.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(70);

/// Mappings of one request.
const PAGE: u32 = 1000;

/// Upper bound on the mappings that `iommu map` fetches; a drawing of more is not readable.
const MAX_MAPPINGS: usize = 100_000;

/// Upper bound on the pages that `iommu map` fetches: a guest can lay out its tables so that many
/// pages are empty.
const MAX_PAGES: usize = 1000;

/// The help text after the words and options.
const REQUESTS_AND_STATUS: &str = "\
Any other request:
  METHOD PATH [JSON]  for example GET /drives, or PUT /vsock '{\"guest_cid\": 3}'

Exit status:
  0  done
  1  the machine refused
  2  the command line cannot be used
  3  no machine answers";

/// Ask a running machine, or tell it what to do.
#[derive(Debug, Args)]
#[command(after_help = REQUESTS_AND_STATUS)]
#[command(
    override_usage = "portcullis ctl --api-socket <PATH> [OPTIONS] <COMMAND>\n       \
    portcullis ctl --api-socket <PATH> [OPTIONS] METHOD PATH [JSON]"
)]
pub struct CtlArgs {
    /// The machine's API socket
    #[arg(long, value_name = "PATH", global = true, env = SOCKET_VARIABLE)]
    api_socket: Option<PathBuf>,
    /// Print the machine's own JSON
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    word: Word,
}

#[derive(Debug, Subcommand)]
enum Word {
    /// What the machine is and does
    Info,
    /// Start it as it is configured
    Start,
    /// Hold its processors
    Pause,
    /// Release its processors
    Resume,
    /// End it and its monitor at once
    Stop,
    /// Its IOMMU: endpoints, how each is served, counters
    Iommu(IommuArgs),
    /// Its metrics
    Metrics,
    /// METHOD PATH [JSON]
    #[command(external_subcommand)]
    Request(Vec<String>),
}

#[derive(Debug, Args)]
struct IommuArgs {
    /// Refresh the table, with rates per second, until interrupted
    #[arg(long)]
    watch: bool,
    /// Seconds between two refreshes
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = interval)]
    interval: u32,
    #[command(subcommand)]
    view: Option<IommuView>,
}

fn interval(text: &str) -> Result<u32, &'static str> {
    let seconds = text.parse().ok();
    let seconds = seconds.filter(|seconds| (1..=3600).contains(seconds));
    seconds.ok_or("use 1 to 3600")
}

#[derive(Debug, Subcommand)]
enum IommuView {
    /// Draw the IOVA space of an endpoint
    Map {
        /// Its name, PCI address, or stream as 0x and hexadecimal digits
        endpoint: String,
    },
}

/// Error of a word; it decides the exit status.
enum Failure {
    /// The machine refused.
    Refused(String),
    /// The request is not valid.
    Usage(String),
    /// No machine answers.
    Unreachable(ClientError),
    /// The answer cannot be parsed.
    Other(String),
    /// Standard output cannot be written.
    Unprinted(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Unprinted(error)
    }
}

/// Performs the command line's word and prints the answer.
pub fn main(args: &CtlArgs) -> ExitCode {
    let mut out = io::stdout().lock();
    let done = Session::new(args).and_then(|session| {
        session.run(&args.word, &mut out)?;
        Ok(out.flush()?)
    });
    let (message, status) = match done {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Failure::Refused(message)) => (message, 1),
        Err(Failure::Usage(message)) => (message, 2),
        Err(Failure::Unreachable(error)) => (Chain(&error).to_string(), 3),
        Err(Failure::Other(message)) => (message, 1),
        Err(Failure::Unprinted(error)) => {
            streams::explain(&error);
            return ExitCode::SUCCESS;
        }
    };
    streams::print_ctl_error(message);
    ExitCode::from(status)
}

struct Session<'a> {
    socket: &'a Path,
    json: bool,
    /// Arguments of [`Word::Request`].
    words: Vec<&'a str>,
}

impl<'a> Session<'a> {
    /// The parser leaves the options after METHOD to this function.
    fn new(args: &'a CtlArgs) -> Result<Self, Failure> {
        let mut socket = args.api_socket.as_deref();
        let mut json = args.json;
        let mut words = Vec::new();
        let given: &[String] = match &args.word {
            Word::Request(given) => given,
            _ => &[],
        };
        let mut given = given.iter().map(String::as_str);
        while let Some(word) = given.next() {
            match word.split_once('=') {
                Some(("--api-socket", path)) => socket = Some(Path::new(path)),
                None if word == "--api-socket" => {
                    let missing = || Failure::Usage("give --api-socket a PATH".to_owned());
                    socket = Some(Path::new(given.next().ok_or_else(missing)?));
                }
                None if word == "--json" => json = true,
                _ => words.push(word),
            }
        }
        let missing = || {
            let problem = format!("no socket: give --api-socket PATH or set {SOCKET_VARIABLE}");
            Failure::Usage(problem)
        };
        Ok(Self {
            socket: socket.ok_or_else(missing)?,
            json,
            words,
        })
    }

    fn run(&self, word: &Word, out: &mut impl Write) -> Result<(), Failure> {
        match word {
            Word::Info => self.info(out),
            Word::Start => self.change("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#),
            Word::Pause => self.change("PATCH", "/vm", r#"{"state":"Paused"}"#),
            Word::Resume => self.change("PATCH", "/vm", r#"{"state":"Resumed"}"#),
            Word::Stop => self.change("PUT", "/actions", r#"{"action_type":"InstanceStop"}"#),
            Word::Iommu(args) => self.iommu(args, out),
            Word::Metrics => {
                let text = self.get("/metrics")?;
                Ok(out.write_all(&text)?)
            }
            Word::Request(_) => self.request(out),
        }
    }

    fn info(&self, out: &mut impl Write) -> Result<(), Failure> {
        let instance = self.get("/")?;
        if self.json {
            return print_json(&instance, out);
        }
        let instance: InstanceInfo = decode(&instance)?;
        let config: VmConfig = decode(&self.get("/vm/config")?)?;
        Ok(out.write_all(show::info(&instance, &config).as_bytes())?)
    }

    fn iommu(&self, args: &IommuArgs, out: &mut impl Write) -> Result<(), Failure> {
        if let Some(IommuView::Map { endpoint }) = &args.view {
            return self.map(endpoint, out);
        }
        if args.watch {
            return self.watch(Duration::from_secs(args.interval.into()), out);
        }
        let body = self.get("/iommu")?;
        if self.json {
            return print_json(&body, out);
        }
        let info: IommuInfo = decode(&body)?;
        Ok(out.write_all(show::iommu(&info, None).as_bytes())?)
    }

    /// Prints the table repeatedly, until it is interrupted, the machine ends, or standard output
    /// is closed.
    fn watch(&self, interval: Duration, out: &mut impl Write) -> Result<(), Failure> {
        let clear = io::stdout().is_terminal();
        let mut before: Option<(IommuInfo, Instant)> = None;
        loop {
            let body = self.get("/iommu")?;
            let now = Instant::now();
            let printed = if self.json {
                let mut line = body.clone();
                line.push(b'\n');
                out.write_all(&line)
            } else {
                let info: IommuInfo = decode(&body)?;
                let since = before
                    .as_ref()
                    .map(|(info, then)| (info, now.duration_since(*then)));
                let home = if clear { "\x1b[H\x1b[2J" } else { "" };
                let table = show::iommu(&info, since);
                before = Some((info, now));
                out.write_all(format!("{home}{table}").as_bytes())
            };
            match printed.and_then(|()| out.flush()) {
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                other => other?,
            }
            std::thread::sleep(interval);
        }
    }

    fn map(&self, name: &str, out: &mut impl Write) -> Result<(), Failure> {
        let path = format!("/iommu/endpoints/{}", encode_segment(name));
        let endpoint = self.get(&path)?;
        let mut mappings: Vec<Mapping> = Vec::new();
        let mut rest = None;
        for _ in 0..MAX_PAGES {
            let after = rest.map_or(String::new(), |rest| format!("&after={rest}"));
            let page = self.get(&format!("{path}/mappings?limit={PAGE}{after}"))?;
            let page: MappingsPage = decode(&page)?;
            mappings.extend(page.mappings);
            rest = page.next;
            if rest.is_none() || mappings.len() >= MAX_MAPPINGS {
                break;
            }
        }
        if self.json {
            if let Some(rest) = rest {
                streams::print_ctl_error(format_args!("mappings above {rest} are left out"));
            }
            let text = serde_json::to_vec(&mappings)
                .map_err(|error| Failure::Other(format!("cannot write JSON: {error}")))?;
            return print_json(&text, out);
        }
        let endpoint: EndpointInfo = decode(&endpoint)?;
        Ok(out.write_all(map::draw(&endpoint, &mappings, rest).as_bytes())?)
    }

    fn request(&self, out: &mut impl Write) -> Result<(), Failure> {
        let (method, target, body) = match *self.words.as_slice() {
            [method, target] => (method, target, None),
            [method, target, body] => (method, target, Some(body)),
            _ => return Err(unknown_word(&self.words)),
        };
        let plain =
            |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
        if !method.bytes().all(|byte| byte.is_ascii_uppercase()) || !target.starts_with('/') {
            return Err(unknown_word(&self.words));
        }
        if !plain(method) || !plain(target) {
            let message = format!("{target:?} has spaces or other characters a path cannot have");
            return Err(Failure::Usage(message));
        }
        let answer = self.ask(method, target, body, CHANGE_TIMEOUT)?;
        match serde_json::from_slice::<Value>(&answer) {
            Ok(_) => print_json(&answer, out),
            Err(_) => Ok(out.write_all(&answer)?),
        }
    }

    fn change(&self, method: &str, target: &str, body: &str) -> Result<(), Failure> {
        self.ask(method, target, Some(body), CHANGE_TIMEOUT)
            .map(drop)
    }

    fn get(&self, target: &str) -> Result<Vec<u8>, Failure> {
        self.ask("GET", target, None, QUERY_TIMEOUT)
    }

    fn ask(
        &self,
        method: &str,
        target: &str,
        body: Option<&str>,
        timeout: Duration,
    ) -> Result<Vec<u8>, Failure> {
        let Answer { status, body } = client::request(self.socket, (method, target), body, timeout)
            .map_err(Failure::Unreachable)?;
        if status < 400 {
            return Ok(body);
        }
        let fault: Option<Value> = serde_json::from_slice(&body).ok();
        let message = fault
            .as_ref()
            .and_then(|fault| fault["fault_message"].as_str())
            .map_or_else(
                || format!("the machine answered with status {status}"),
                str::to_owned,
            );
        Err(Failure::Refused(message))
    }
}

/// The words that are not requests.
const WORDS: [&str; 7] = [
    "info", "start", "pause", "resume", "stop", "iommu", "metrics",
];

/// Methods of the API's resources.
const METHODS: [&str; 3] = ["GET", "PUT", "PATCH"];

fn unknown_word(words: &[&str]) -> Failure {
    let quoted = words.join(" ").escape_debug().to_string();
    let fix = match *words {
        [word] if METHODS.contains(&word) => format!("write {word} PATH, such as {word} /vm"),
        [method, target, ..] if METHODS.contains(&method) && !target.starts_with('/') => {
            "a PATH begins with /".to_owned()
        }
        [_, _, _, _, ..] => "write the JSON as one word, in quotes".to_owned(),
        [word, ..] if METHODS.contains(&word.to_uppercase().as_str()) => {
            format!("write the method as {}", word.to_uppercase())
        }
        [word, ..] => match closest(word, WORDS) {
            Some(near) => format!("did you mean {near}?"),
            None => format!("use {}, or METHOD PATH [JSON]", WORDS.join(", ")),
        },
        [] => format!("use {}, or METHOD PATH [JSON]", WORDS.join(", ")),
    };
    Failure::Usage(format!("cannot make sense of \"{quoted}\"; {fix}"))
}

fn decode<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, Failure> {
    serde_json::from_slice(body).map_err(|error| {
        Failure::Other(format!(
            "cannot read the machine's answer, its version may be another: {error}"
        ))
    })
}

fn print_json(body: &[u8], out: &mut impl Write) -> Result<(), Failure> {
    if body.is_empty() {
        return Ok(());
    }
    let value: Value = decode(body)?;
    writeln!(out, "{value:#}")?;
    Ok(())
}

/// Encodes a name as a path segment (RFC 3986 §2.1).
fn encode_segment(name: &str) -> String {
    name.bytes()
        .map(|byte| match byte {
            byte if byte.is_ascii_alphanumeric() || b"-._~:".contains(&byte) => {
                char::from(byte).to_string()
            }
            byte => format!("%{byte:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests;
