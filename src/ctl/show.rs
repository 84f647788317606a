//! Answers as text for users.

use std::fmt::Write as _;
use std::time::Duration;
use vmm::action::{EndpointCounters, EndpointInfo, InstanceInfo, IommuInfo, RegistrationKind};
use vmm::config::{IommuModel, VmConfig};

/// Formats the machine in a few lines.
pub fn info(instance: &InstanceInfo, config: &VmConfig) -> String {
    let mut rows = vec![
        row(["machine", &instance.id]),
        row(["state", &instance.state.to_string()]),
        row([
            "monitor",
            &format!("{} {}", instance.app_name, instance.vmm_version),
        ]),
        row(["sandbox", &instance.sandbox.to_string()]),
        row(["processors", &config.machine_config.vcpu_count.to_string()]),
        row([
            "memory",
            &size(config.machine_config.mem_size_mib.saturating_mul(1 << 20)),
        ]),
        row(["iommu", &iommu_words(config)]),
    ];
    let kernel = config.boot_source.as_ref();
    let kernel = kernel.map_or("none yet", |boot| &boot.kernel_image_path);
    rows.push(row(["kernel", kernel]));
    for drive in &config.drives {
        let access = if drive.is_read_only {
            ", read-only"
        } else {
            ""
        };
        let text = format!("{}{access}{}", drive.path_on_host, direct(drive.iommu));
        rows.push(row([&format!("drive {}", drive.drive_id), &text]));
    }
    for interface in &config.network_interfaces {
        let text = format!("{}{}", interface.host_dev_name, direct(interface.iommu));
        rows.push(row([&format!("net {}", interface.iface_id), &text]));
    }
    if let Some(vsock) = &config.vsock {
        let text = format!("cid {}{}", vsock.guest_cid, direct(vsock.iommu));
        rows.push(row(["vsock", &text]));
    }
    if let Some(entropy) = &config.entropy {
        rows.push(row([
            "entropy",
            &format!("present{}", direct(entropy.iommu)),
        ]));
    }
    table(&rows, 2)
}

fn direct(behind_iommu: bool) -> &'static str {
    if behind_iommu {
        ""
    } else {
        ", not behind the IOMMU"
    }
}

fn iommu_words(config: &VmConfig) -> String {
    let iommu = &config.iommu;
    match iommu.model {
        IommuModel::Smmuv3 => {
            let ats = if iommu.ats { ", ATS" } else { "" };
            format!("smmuv3, stage {}{ats}", iommu.stage)
        }
        model => model.to_string(),
    }
}

/// Formats the IOMMU and its endpoints. With an earlier state, the counters are rates per second.
pub fn iommu(info: &IommuInfo, since: Option<(&IommuInfo, Duration)>) -> String {
    if info.model == IommuModel::None && info.endpoints.is_empty() {
        return "no IOMMU, and no devices yet\n".to_owned();
    }
    let on = match (info.model, info.enabled) {
        (IommuModel::None, _) => "",
        (_, true) => ", in use by the guest",
        (_, false) => ", not switched on by the guest",
    };
    let mut text = format!("{}{on}\n", info.model);
    if !info.features.is_empty() {
        let names: Vec<String> = info
            .features
            .iter()
            .map(|feature| match feature.negotiated {
                Some(false) => format!("({})", feature.name),
                _ => feature.name.clone(),
            })
            .collect();
        let _ = writeln!(text, "offers {}", names.join(" "));
    }
    text.push('\n');
    let per_second = if since.is_some() { "/s" } else { "" };
    let mut header: Vec<String> = ["ENDPOINT", "DEVICE", "STREAM", "STATE", "CONTEXT", "VHOST"]
        .map(str::to_owned)
        .into();
    let counters = [
        "TRANSL", "HITS", "MISSES", "UPDATES", "PREFILL", "INVAL", "SAVED",
    ];
    header.extend(counters.map(|name| format!("{name}{per_second}")));
    header.extend(["FAULTS", "STALLED"].map(str::to_owned));
    let mut rows = vec![header];
    for endpoint in &info.endpoints {
        rows.push(endpoint_row(endpoint, since));
    }
    text.push_str(&table(&rows, 6));
    text.push_str(&notes(info));
    text
}

fn endpoint_row(endpoint: &EndpointInfo, since: Option<(&IommuInfo, Duration)>) -> Vec<String> {
    let registration = endpoint.registration.as_ref();
    let mut cells = vec![
        endpoint.id.clone(),
        format!("{} {}", endpoint.device, endpoint.pci_address),
        format!("{:#x}", endpoint.stream_id),
        endpoint.state.to_string(),
        context(endpoint),
        registration.map_or("-".to_owned(), |registration| registration.kind.to_string()),
    ];
    let now = rates(&endpoint.counters);
    let earlier = since.and_then(|(info, elapsed)| {
        let mut endpoints = info.endpoints.iter();
        let before = endpoints.find(|before| before.pci_address == endpoint.pci_address)?;
        Some((rates(&before.counters), elapsed))
    });
    match (since, earlier) {
        (None, _) => cells.extend(now.map(|count| count.to_string())),
        (Some(_), None) => cells.extend(now.map(|_| "-".to_owned())),
        (Some(_), Some((before, elapsed))) => {
            let counts = now.into_iter().zip(before);
            cells.extend(
                counts.map(|(now, before)| per_second(now.saturating_sub(before), elapsed)),
            );
        }
    }
    cells.push(endpoint.counters.all_faults().to_string());
    cells.push(endpoint.counters.stalled_queues.to_string());
    cells
}

/// Counters that are shown as rates, in the order of their columns.
fn rates(counters: &EndpointCounters) -> [u64; 7] {
    [
        counters.translations,
        counters.hits,
        counters.misses,
        counters.updates,
        counters.prefills,
        counters.invalidations_sent,
        counters.invalidations_saved,
    ]
}

fn per_second(count: u64, elapsed: Duration) -> String {
    let millis = elapsed.as_millis().max(1);
    (u128::from(count) * 1000 / millis).to_string()
}

fn context(endpoint: &EndpointInfo) -> String {
    let parts = [
        endpoint.domain.map(|domain| format!("domain {domain}")),
        endpoint.asid.map(|asid| format!("asid {asid}")),
        endpoint.vmid.map(|vmid| format!("vmid {vmid}")),
    ];
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    if parts.is_empty() {
        "-".to_owned()
    } else {
        parts.join(" ")
    }
}

/// Notes below the table: the reason of each registration, and the faults by type.
fn notes(info: &IommuInfo) -> String {
    let mut text = String::new();
    for endpoint in &info.endpoints {
        if let Some(registration) = &endpoint.registration
            && registration.kind != RegistrationKind::DevIotlb
        {
            let _ = write!(text, "\n{}: {}", endpoint.id, registration.reason);
        }
        for (kind, count) in &endpoint.counters.faults {
            let _ = write!(text, "\n{}: {count} x {kind}", endpoint.id);
        }
    }
    if !text.is_empty() {
        text.push('\n');
    }
    text
}

fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(str::to_owned).into()
}

/// Aligns rows of cells in columns: the first `left` to the left, the others to the right. Control
/// characters are shown as `?`, because they can move the terminal's cursor.
fn table(rows: &[Vec<String>], left: usize) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let cell: String = cell
                .chars()
                .map(|character| {
                    if character.is_control() {
                        '?'
                    } else {
                        character
                    }
                })
                .collect();
            let _ = if column < left {
                write!(line, "{cell:<width$}  ")
            } else {
                write!(line, "{cell:>width$}  ")
            };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Formats a number of bytes in a unit that fits, with at most one decimal.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut scale = 1024u64;
    let mut units = UNITS.iter();
    let mut unit = units.next();
    while bytes / scale >= 1024 {
        let Some(next) = units.next() else { break };
        unit = Some(next);
        scale *= 1024;
    }
    let whole = bytes / scale;
    let tenth = (bytes % scale) / (scale / 10).max(1);
    let unit = unit.unwrap_or(&"B");
    if tenth == 0 {
        format!("{whole} {unit}")
    } else {
        format!("{whole}.{} {unit}", tenth.min(9))
    }
}
