//! Two requesters behind a virtio-iommu, and one behind an SMMUv3: how a
//! consumer that keeps translations, as vhost does, registers and is notified.
//!
//!     cargo run -p iommu --example notifier_chain

use std::sync::{Arc, Mutex, PoisonError};

use iommu::smmuv3::{Smmu, SmmuConfig, SmmuLine, SmmuWires};
use iommu::virtio::spec::{Features, request};
use iommu::virtio::{FaultReport, FaultSink, VirtioIommu, VirtioIommuConfig};
use iommu::{
    Access, AddressSpace, Gpa, GuestRam, Iommu, IommuNotifier, IommuRegion, Iova, IovaRange,
    Mapping, NotifierEvents, NotifierSink, Registration, StreamId,
};
use vm_memory::{Bytes as _, GuestAddress};

const DISK: StreamId = StreamId::from_bdf(0, 1, 0);
const NIC: StreamId = StreamId::from_bdf(0, 2, 0);

/// A consumer with a cache of translations, as the kernel's vhost has.
#[derive(Default)]
struct Vhost {
    cache: Mutex<Vec<Mapping>>,
    events: Mutex<NotifierEvents>,
}

impl Vhost {
    /// Registers for device IOTLB invalidations, with invalidations of every
    /// mapping as the fallback.
    fn register(region: &IommuRegion) -> Arc<Self> {
        let vhost = Arc::new(Self::default());
        region.register(IommuNotifier {
            acceptable: vec![
                NotifierEvents::DEVIOTLB_UNMAP,
                NotifierEvents::MAP | NotifierEvents::UNMAP,
                NotifierEvents::UNMAP,
            ],
            range: IovaRange::ALL,
            sink: Arc::clone(&vhost) as Arc<dyn NotifierSink>,
        });
        vhost
    }

    fn cached(&self) -> usize {
        let cache = self.cache.lock();
        cache.unwrap_or_else(PoisonError::into_inner).len()
    }

    fn events(&self) -> NotifierEvents {
        *self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl NotifierSink for Vhost {
    fn map(&self, mapping: &Mapping) {
        let cache = self.cache.lock();
        cache.unwrap_or_else(PoisonError::into_inner).push(*mapping);
    }

    fn unmap(&self, ranges: &[IovaRange]) {
        let cache = self.cache.lock();
        let mut cache = cache.unwrap_or_else(PoisonError::into_inner);
        cache.retain(|known| !ranges.iter().any(|range| range.overlaps(known.iova)));
    }

    fn registered(&self, outcome: &Registration) {
        for refused in &outcome.refused {
            println!("  {refused}");
        }
        println!("  registered for {}", outcome.events);
        *self.events.lock().unwrap_or_else(PoisonError::into_inner) = outcome.events;
    }
}

/// The monitor's callbacks of both models. Interrupts are dropped.
struct NoGuest;

impl FaultSink for NoGuest {
    fn report(&self, report: &FaultReport) {
        println!("  fault of {} at {}", report.endpoint, report.address);
    }
}

impl SmmuWires for NoGuest {
    fn pulse(&self, _line: SmmuLine) {}

    fn message(&self, _address: Gpa, _data: u32) -> bool {
        false
    }
}

/// Sends a request to the virtio-iommu, as the driver does on its queue.
fn send(model: &VirtioIommu, kind: u8, words: &[u32]) {
    let mut bytes = [0; request::MAP_SIZE];
    bytes[0] = kind;
    for (field, word) in bytes[4..].chunks_exact_mut(4).zip(words) {
        field.copy_from_slice(&word.to_le_bytes());
    }
    let mut reply = [0xff; request::TAIL_SIZE];
    let _ = model.handle(&bytes, &mut reply);
    // After the flush the request is complete and may go to the used ring.
    model.flush();
    assert_eq!(reply, [0; request::TAIL_SIZE], "status of the request");
}

fn behind_virtio_iommu(ram: &Arc<GuestRam>) {
    println!("behind a virtio-iommu:");
    let config = VirtioIommuConfig {
        input_range: IovaRange::block(Iova(0), 48),
        msi_window: None,
        boot_bypass: false,
        max_mappings: 1 << 16,
    };
    let model = Arc::new(VirtioIommu::new(config, Arc::clone(ram), Arc::new(NoGuest)));
    model.negotiated(Features::MAP_UNMAP);
    let region = |stream| IommuRegion::new(Arc::clone(&model) as Arc<dyn Iommu>, stream);
    let (disk, nic) = (region(DISK), region(NIC));
    let vhost = Vhost::register(&nic);
    assert_eq!(
        vhost.events(),
        NotifierEvents::MAP | NotifierEvents::UNMAP,
        "a virtio-iommu has no device IOTLB"
    );

    // Domain 1 has both requesters and one page: IOVA 0x1000 maps to 0x8000.
    send(&model, request::ATTACH, &[1, DISK.0, 0, 0]);
    send(&model, request::ATTACH, &[1, NIC.0, 0, 0]);
    send(
        &model,
        request::MAP,
        &[1, 0x1000, 0, 0x1fff, 0, 0x8000, 0, 3],
    );
    assert_eq!(vhost.cached(), 1, "prefilled by the MAP");

    // An emulated device reaches RAM through the same mapping.
    let dma = AddressSpace::translated(disk, Arc::clone(ram)).dma();
    let written = dma.view().write_obj(42_u32, GuestAddress(0x1000));
    assert!(written.is_ok());
    let read: u32 = ram.read_obj(GuestAddress(0x8000)).expect("RAM");
    assert_eq!(read, 42);

    send(&model, request::UNMAP, &[1, 0x1000, 0, 0x1fff, 0, 0]);
    assert_eq!(vhost.cached(), 0, "invalidated when the UNMAP is complete");
    let view = dma.view();
    assert!(view.read_obj::<u32>(GuestAddress(0x1000)).is_err());
}

fn behind_smmu(ram: &Arc<GuestRam>) {
    println!("behind an SMMUv3:");
    let config = SmmuConfig {
        ats: true,
        ..SmmuConfig::default()
    };
    let smmu = Arc::new(Smmu::new(config, Arc::clone(ram), Arc::new(NoGuest)));
    let region = IommuRegion::new(Arc::clone(&smmu) as Arc<dyn Iommu>, NIC);
    let vhost = Vhost::register(&region);
    assert_eq!(vhost.events(), NotifierEvents::UNMAP, "ATS is not enabled");

    // The driver's stream table of 32 entries at 0x2000. The STE of the NIC is
    // valid, has stage 1 and allows ATS (IHI 0070 §5.2 V, Config, EATS).
    let ste = GuestAddress(0x2000 + 64 * u64::from(NIC.0));
    ram.write_obj([1_u64 | 0b101 << 1 | 0x4000, 1 << 28], ste)
        .expect("RAM");
    smmu.write64(0x80, 0x2000); // STRTAB_BASE
    smmu.write(0x88, 5); // STRTAB_BASE_CFG.LOG2SIZE
    smmu.write(0x20, 1); // CR0.SMMUEN

    println!("the guest enables ATS in the function:");
    smmu.set_ats_enabled(NIC, true);
    assert_eq!(vhost.events(), NotifierEvents::DEVIOTLB_UNMAP);
    println!("the guest disables ATS:");
    smmu.set_ats_enabled(NIC, false);
    assert_eq!(vhost.events(), NotifierEvents::UNMAP);

    // No CD is valid: the access faults.
    let fault = region.enter().translate(Iova(0x1000), Access::Read);
    println!("  {}", fault.expect_err("a fault"));
}

fn main() {
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), 0x1_0000)]).expect("memory");
    let ram = Arc::new(ram);
    behind_virtio_iommu(&ram);
    behind_smmu(&ram);
}
