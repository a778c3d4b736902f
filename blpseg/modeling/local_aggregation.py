"""Local aggregation of the logits (METHOD section 3): the plain formula, until the fast forms stand beside it."""
import torch


def local_aggregation(logits, features, sigma, impl="auto", **kw):
    n,c,h,w=logits.shape
    f=features.flatten(2).float(); s=logits.flatten(2).float()
    a=torch.softmax(f.transpose(1,2)@f,dim=1)
    y,x=torch.meshgrid(torch.arange(h),torch.arange(w),indexing='ij'); p=torch.stack([y.flatten(),x.flatten()],1).float()
    d=torch.cdist(p,p,compute_mode='donot_use_mm_for_euclid_dist')**2
    W=a*torch.exp(-d/(2*sigma**2))
    return ((s@W)/(W.sum(1,keepdim=True)+1e-7)).view(n,c,h,w)
